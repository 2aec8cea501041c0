"""One torch thread for all tests: they are small, and two test processes on one machine must not fight for cores."""

import torch

torch.set_num_threads(1)
