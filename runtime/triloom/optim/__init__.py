from .base import BLOCK, Group, Hyper, Optimizer, Rule, Spec, Treatment, everything, matrices
from .elementwise import SGD, AdamW, AdamW8bit, Lion
from .rates import LrSchedule, constant, inverse_sqrt, warmup_cosine, wsd
