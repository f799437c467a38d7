"""The comparison that one GPU makes in minutes: eight methods, fewer configurations."""

from __future__ import annotations

from protocol import Protocol, Settings, rates
from two_cores import INPUTS, TWO_CORES

_RANDOM: Settings = {"method": "random"}
_OSF: Settings = {"method": "peft-osf", "protect": "0.5"}
_EWC: Settings = {"method": "ewc", "ewc_rows": 32}

ONE_GPU = Protocol(
    train_items=480,
    test_items=250,
    entry_items=250,
    dev_items=120,
    entry_rates=(1e-4,),
    dev_order=TWO_CORES.dev_order,
    orders=TWO_CORES.orders,
    seeds=(0, 1, 2),
    foremost=("plain", "sculpt", "random", "peft-osf", "lora"),
    common={**TWO_CORES.common, "batch_size": 16},
    # plain and sculpt three each, the others two: the rates that did well on two cores, and around them.
    configs={
        "plain": rates({"protect": "none"}, 2e-5, 4e-5, 8e-5),
        "sculpt": {
            **rates({**INPUTS, "remember": "inputs:0.95"}, 1e-4, 2e-4, named="inputs .95, "),
            **rates({**INPUTS, "remember": "inputs:0.9"}, 1e-4, named="inputs .9, "),
        },
        "random": rates(
            {**_RANDOM, **INPUTS, "remember": "inputs:0.95"}, 1e-4, 4e-5, named="dimensions of inputs .95, "
        ),
        "peft-osf": rates(_OSF, 1e-4, 3e-5, named="half, "),
        "lora": rates({"method": "lora"}, 1e-3, 3e-4, named="rank 8, "),
        "o-lora": {
            **rates({"method": "o-lora", "olora_lambda": 0.5}, 1e-3, named="rank 8, lambda .5, "),
            **rates({"method": "o-lora", "olora_lambda": 0.05}, 1e-3, named="rank 8, lambda .05, "),
        },
        "ewc": {
            **rates({**_EWC, "ewc_lambda": 1e3}, 4e-5, named="lambda 1e3, "),
            **rates({**_EWC, "ewc_lambda": 1e5}, 4e-5, named="lambda 1e5, "),
        },
        "replay": rates({"method": "replay", "replay_share": 0.05}, 2e-5, 4e-5, named="5 %, "),
    },
)
