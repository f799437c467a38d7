"""The comparison on a longer sequence, of short texts: does plain fine-tuning forget more over twice as many tasks?"""

from __future__ import annotations

from protocol import KNOWN_TEXT, Protocol, rates
from two_cores import INPUTS, TWO_CORES

LONG_SEQUENCE = Protocol(
    datasets={
        "dbpedia": "TC/dbpedia",
        "agnews": "TC/agnews",
        "SST-2": "SC/SST-2",
        "QQP": "QQP/QQP",
        "emotion": "datasets/emotion",
        "offensive": "datasets/offensive",
        "banking": "data/data_full.json/banking",
        "travel": "data/data_full.json/travel",
        "kitchen_and_dining": "data/data_full.json/kitchen_and_dining",
        "work": "data/data_full.json/work",
    },
    train_items=320,
    test_items=200,
    entry_items=200,
    dev_items=100,
    entry_rates=(1e-4,),
    dev_order=("agnews", "banking", "SST-2", "work", "dbpedia", "emotion", "travel", "kitchen_and_dining"),
    orders={
        "L1": ("dbpedia", "travel", "emotion", "agnews", "work", "SST-2", "kitchen_and_dining", "banking"),
        "L2": ("SST-2", "kitchen_and_dining", "dbpedia", "banking", "emotion", "travel", "agnews", "work"),
    },
    seeds=(0, 1, 2),
    foremost=("plain", "sculpt", "sculpt and a text", "sculpt and its own text"),
    settled=("sculpt and a text", "sculpt and its own text"),
    reads_text=True,
    # Of every task what it had learned and what is left in the end; log-probabilities of 15 options an item would take
    # longer than the training.
    common={**TWO_CORES.common, "eval_rows": "learned", "eval_options": False},
    configs={
        "plain": rates({"protect": "none"}, 2e-5, 5e-5, 1e-4),
        "sculpt": {
            **rates({**INPUTS, "remember": "inputs:0.95"}, 1e-4, 2e-4, named="inputs .95, "),
            **rates({**INPUTS, "remember": "inputs:0.9"}, 1e-4, named="inputs .9, "),
        },
        # Added when two pairs had shown that "sculpt" at its best costs the model more of what no task is about than
        # plain fine-tuning does. It has that one rate alone.
        "sculpt and a text": rates(
            {**INPUTS, "remember": "inputs:0.95", "remember_text": KNOWN_TEXT}, 2e-4, named="inputs .95, "
        ),
        # Added when the text had been seen to help, for whoever has none.
        "sculpt and its own text": rates(
            {**INPUTS, "remember": "inputs:0.95", "remember_text": "generated"}, 2e-4, named="inputs .95, "
        ),
        "random": rates(
            {"method": "random", **INPUTS, "remember": "inputs:0.95"},
            *(5e-5, 1e-4, 2e-5),
            named="dimensions of inputs .95, ",
        ),
        "peft-osf": rates({"method": "peft-osf", "protect": "0.5"}, 2e-5, 5e-5, 1e-4, named="half, "),
    },
    ablations={
        **{name: {**settings, "lr": 1e-4} for name, settings in TWO_CORES.ablations.items()},
        "bound: all tasks at once": {"method": "multitask", "lr": 5e-5},
        "bound: every task from the first weights": {"method": "per-task", "lr": 5e-5},
    },
)
