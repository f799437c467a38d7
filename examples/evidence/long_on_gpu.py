"""The longer sequence again, with other seeds and on a GPU, and more methods beside it."""

from __future__ import annotations

from dataclasses import replace

from long_sequence import LONG_SEQUENCE
from protocol import rates
from two_cores import INPUTS

_CHOSEN = {
    "plain": "lr 5e-05",
    "sculpt": "inputs .95, lr 0.0002",
    "sculpt and a text": "inputs .95, lr 0.0002",
    "sculpt and its own text": "inputs .95, lr 0.0002",
}

# What two cores chose for plain fine-tuning and ours, on the development order, is taken from there, and the tasks that
# enter.
LONG_ON_GPU = replace(
    LONG_SEQUENCE,
    datasets={name: LONG_SEQUENCE.datasets[name] for name in LONG_SEQUENCE.dev_order},
    entry_rates=(),
    seeds=(3, 4, 5),
    foremost=(*_CHOSEN, "peft-osf", "lora"),
    configs={
        **{method: {config: LONG_SEQUENCE.configs[method][config]} for method, config in _CHOSEN.items()},
        "peft-osf": rates({"method": "peft-osf", "protect": "0.5"}, 2e-5, 5e-5, named="half, "),
        "lora": rates({"method": "lora"}, 1e-3, 3e-4, named="rank 8, "),
        "random": rates(
            {"method": "random", **INPUTS, "remember": "inputs:0.95"}, 5e-5, 1e-4, named="dimensions of inputs .95, "
        ),
    },
    ablations={},
    settled=tuple(_CHOSEN),
)
