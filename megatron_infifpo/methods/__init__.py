"""Methods: presets over orthogonal options, their command line, and their checks.

A flag overrides one option of the preset. Losses and fusions declare the options that are theirs.
An option that would have no effect is an error, never ignored. Training, tools and examples all
resolve a method here.
"""

from megatron_infifpo.methods.flags import add_method_flags, method_from_options
from megatron_infifpo.methods.method import METHODS, Method
from megatron_infifpo.methods.resolving import resolve

__all__ = ["METHODS", "Method", "add_method_flags", "method_from_options", "resolve"]
