# Two images of one source: `web` serves the pages and has no torch; `worker` trains, harvests and answers live questions.
#   docker build --target web -t headscope-web .
#   docker build --target worker -t headscope-worker --build-arg TORCH="torch==2.13.0 --index-url <address of a build>" .
# BASE is any Debian or Ubuntu with Python 3.11 or newer, python3-venv and the CA certificates.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS source
# For a mirror of the package index, where there is one; pip reads them by these names.
ARG PIP_INDEX_URL
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /source
COPY constraints.txt ./
RUN python3 -m venv /opt/headscope
ENV PATH=/opt/headscope/bin:$PATH

FROM source AS web-build
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt . && python -m compileall -q /opt/headscope

FROM source AS worker-build
# torch first and alone, so that nothing that needs it chooses another build; a layer of its own, which seldom changes.
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3013,SC2086
RUN pip install --no-cache-dir ${TORCH}
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[worker]'

FROM ${BASE} AS runtime
RUN groupadd --gid 10001 headscope \
    && useradd --uid 10001 --gid headscope --home-dir /data --no-create-home --shell /usr/sbin/nologin headscope \
    && install --directory --owner headscope --group headscope --mode 0750 /data
ENV PATH=/opt/headscope/bin:$PATH PYTHONUNBUFFERED=1 \
    HEADSCOPE_DATA=/data HEADSCOPE_CACHE=/data/cache HF_HOME=/data/cache/huggingface
VOLUME /data
WORKDIR /data
USER 10001:10001

FROM runtime AS web
COPY --from=web-build /opt/headscope /opt/headscope
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["headscope", "serve"]

FROM runtime AS worker
COPY --from=worker-build /opt/headscope /opt/headscope
ENV HEADSCOPE_METRICS_PORT=9100
EXPOSE 9100
HEALTHCHECK --interval=20s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9100/healthz', timeout=4)"]
CMD ["headscope", "worker"]
