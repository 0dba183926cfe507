"""Measurements of `swa_dist`, its peers and what the machine can do at best.

`./scripts/benchmark` and `./scripts/evidence` run them, and write what they find as Markdown and
pictures.
"""
