"""Which of two is better, and is that more than chance: `python -m ludic.compare A B`.

A and B are the records of two evaluations (`evaluations`), compared problem by problem, or two sets of training runs (`runs`),
compared seed by seed. `paired` has the statistics. Left out: anything that needs a model.
"""
