"""Adapter methods. A method is one file and one line here.

All of them are PEFT's: Fedgraft only says which modules a method suits, which of its parameters
are trained and sent, and which PEFT configuration builds it.
"""

from fedgraft_common.adapters.film import FILM
from fedgraft_common.adapters.lora import FFA_LORA, LORA
from fedgraft_common.adapters.method import AdapterMethod, find_method, register

register(FFA_LORA)
register(LORA)
register(FILM)

__all__ = ["AdapterMethod", "find_method", "register"]
