"""Kernels for a CPU, written in torch and numpy, each with the time that it saves.

pointwise   RMSNorm and rotary position embedding with their gradients written out
dropout     dropout masks as bits, drawn eight at a time
"""
