# SPDX-License-Identifier: Apache-2.0
"""The model itself, as tensors: configuration, weights, layers, tokens. It knows no ranks."""
