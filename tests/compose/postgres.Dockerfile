# A stand-in for the official image of PostgreSQL, from Debian's package: the same variables, folder and user's id.
ARG BASE=localhost/headscope-base
FROM ${BASE}
RUN usermod --uid 999 postgres && chown -R 999 /var/lib/postgresql /var/run/postgresql
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data
COPY postgres.sh /usr/local/bin/postgres.sh
RUN install --directory --owner postgres --mode 0700 /var/lib/postgresql/data
VOLUME /var/lib/postgresql/data
USER 999
ENTRYPOINT ["sh", "/usr/local/bin/postgres.sh"]
