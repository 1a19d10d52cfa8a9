"""What a worker does at each kind of job: work of `sae_core`, and results in the store.

What happens to a training job (`training`), top to bottom:

    train      resolve model and corpus, load the model, cut rows, train           one durable step; it resumes itself
    evaluate   measure the SAE                                                     from <data>/jobs/<id>
    publish    move the SAE to <data>/saes/<name>, write its row
    follow     queue the config's harvests; each replaces the one before

A sweep trains many SAEs in one such step, then evaluates and publishes one after the other. An import (`importing`) brings a
peer's SAE, or dashboards of one that is here. An evaluation (`evaluating`) of an SAE that exists measures it and puts the
numbers in the place of the old ones. A study (`studying`) puts a question to a feature or to a model's heads and keeps what
it finds, and so does a comparison (`comparing`) of two SAEs. And what happens to a harvest of one SAE or of many
(`harvesting`): scan (for all), choose (a step for each), visit (for all); then for each: features, write (a step per part),
publish. Scan and visit are cut into shards, and where more workers are there, into jobs of some shards each, which any of
them takes.

A kind of job is a function of a `run.Run`, one attempt at the job; `server.worker` is the process that makes the attempts.
"""
