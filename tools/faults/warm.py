"""Imports what all readers need, once, in the process that others are forked from."""

from importlib import import_module

for _name in (
    "faults.readers",
    "vizattn.adapters",
    "vizattn.data.audit",
    "vizattn.data.segmentation",
    "vizattn.data.transfer",
    "vizattn.engine.evaluate",
    "vizattn.engine.features",
    "vizattn.engine.hooks",
    "vizattn.engine.predict",
    "vizattn.engine.run_report",
    "vizattn.engine.vtab.report",
    "vizattn.weights.download",
):
    import_module(_name)
