"""Influences of a whole training set, in one process or many, kept in a store that survives a kill.

    python -m support.job --help
    torchrun --nproc-per-node=4 -m support.job fit …

What runs where: `command` reads the command line, `settings` says what can be set, `sources` brings texts,
`tasks` a model of either kind, `examples` the texts in blocks, `team` the processes, `store` keeps the
results, in the `layout` that zarr reads, `work` puts a job together; `plan`, `fit`, `score`, `index`, `top`
with its `page` and `tokens`, and `suspects` are its steps, `fleet` what it would cost elsewhere.
"""
