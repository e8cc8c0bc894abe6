"""What fits: a run's bytes on each GPU, host and disk in every hosting, before anything is allocated.

``job`` is the run, ``machine`` what there is; ``student`` and ``teacher`` enter what they take into ``books``; ``fit``
makes a plan of it for each hosting, ``speed`` orders them. ``check`` is the trainer's refusal of what cannot fit.
"""

from megatron_tide.hosting.plan.check import check_plan

__all__ = ["check_plan"]
