"""Adapter methods. A method is one file and one line here.

All of them are PEFT's: Fedgraft only says which modules a method suits, which of its parameters
are trained and sent, and which PEFT configuration builds it.
"""

from fedgraft_common.adapters.dora import DORA
from fedgraft_common.adapters.film import FILM
from fedgraft_common.adapters.full import FULL
from fedgraft_common.adapters.ia3 import IA3
from fedgraft_common.adapters.ln_tuning import LN_TUNING
from fedgraft_common.adapters.lora import FFA_LORA, LORA
from fedgraft_common.adapters.method import AdapterMethod, find_method, register
from fedgraft_common.adapters.prefix import PREFIX
from fedgraft_common.adapters.prompt import PROMPT

register(FFA_LORA)
register(LORA)
register(DORA)
register(IA3)
register(FILM)
register(LN_TUNING)
register(PROMPT)
register(PREFIX)
register(FULL)

__all__ = ["AdapterMethod", "find_method", "register"]
