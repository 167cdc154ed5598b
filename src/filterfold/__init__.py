"""Filterfold makes ConvNets small and fast while they train."""

__version__ = "0.1.0"
