"""Influences of a whole training set, in one process or many, kept in a store that survives a kill.

    python -m support.job --help
    torchrun --nproc-per-node=4 -m support.job fit …

What runs where: `command` reads the command line, `settings` says what can be set, `sources` brings
model and data, `examples` the data in blocks, `team` the processes, `store` the results, `fit` and
`score` do the work, `top` and `page` tell what came out, `plan` and `fleet` what it will cost.
"""
