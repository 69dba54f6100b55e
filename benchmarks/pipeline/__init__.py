# SPDX-License-Identifier: Apache-2.0
"""The reference model: what microbatches, ranks and balance gain."""

PROGRAM_NEEDS = ("torch", "safetensors", "rich", "numpy")  # packages
