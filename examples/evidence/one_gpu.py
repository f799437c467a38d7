"""The comparison that one GPU makes in minutes: eight methods, twice the rows, fewer configurations."""

from __future__ import annotations

from protocol import Protocol, Settings, rates
from two_cores import TWO_CORES

_FROZEN: Settings = {"others": "freeze"}
_CHANGES: Settings = {"protect": "0.25", "remember": "rank:0.12", **_FROZEN}
_INPUTS: Settings = {"protect": "0", "sides": "right", "remember": "inputs:0.95", **_FROZEN}
_RANDOM: Settings = {"method": "random"}
_OSF: Settings = {"method": "peft-osf", "protect": "0.5"}
_EWC: Settings = {"method": "ewc", "ewc_rows": 32}

ONE_GPU = Protocol(
    train_items=640,
    test_items=250,
    entry_items=250,
    dev_items=120,
    entry_rates=(4e-5, 1e-4),
    dev_order=TWO_CORES.dev_order,
    orders=TWO_CORES.orders,
    # In this order: the last one only as far as the time goes.
    seeds=(0, 1, 2),
    # Nothing is kept between tasks: a run is shorter than what writing its state would take.
    common={
        "bf16": True,
        "max_length": 256,
        "batch_size": 16,
        "eval_batch_size": 250,
        "eval_rows": "seen",
        "leak_every": 0,
        "save_every": None,
    },
    # plain and sculpt four each, the others two or three: the rates that did well on two cores, and around them.
    configs={
        "plain": rates({"protect": "none"}, 2e-5, 4e-5, 1e-5, 8e-5),
        "sculpt": {
            **rates(_INPUTS, 1e-4, 2e-4, named="inputs .95, "),
            **rates({**_INPUTS, "remember": "inputs:0.9"}, 1e-4, named="inputs .9, "),
            **rates(_CHANGES, 1e-4, named="weights .25 + changes .12, "),
        },
        "random": {
            **rates({**_RANDOM, **_INPUTS}, 1e-4, 4e-5, named="dimensions of inputs .95, "),
            **rates({**_RANDOM, **_CHANGES}, 1e-4, named="dimensions of .25 + .12, "),
        },
        "peft-osf": rates(_OSF, 1e-4, 3e-5, named="half, "),
        "lora": rates({"method": "lora"}, 3e-4, 1e-3, named="rank 8, "),
        "o-lora": {
            **rates({"method": "o-lora", "olora_lambda": 0.5}, 1e-3, named="rank 8, lambda .5, "),
            **rates({"method": "o-lora", "olora_lambda": 0.05}, 1e-3, 3e-4, named="rank 8, lambda .05, "),
        },
        "ewc": {
            **rates({**_EWC, "ewc_lambda": 1e3}, 4e-5, named="lambda 1e3, "),
            **rates({**_EWC, "ewc_lambda": 1e5}, 4e-5, named="lambda 1e5, "),
        },
        "replay": rates({"method": "replay", "replay_share": 0.05}, 2e-5, 4e-5, named="5 %, "),
    },
)
