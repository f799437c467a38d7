"""Shared settings: two intra-op threads everywhere, hypothesis without deadlines (timing is never asserted)."""

import hypothesis
import torch

hypothesis.settings.register_profile("sculpt", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("sculpt")
torch.set_num_threads(2)
