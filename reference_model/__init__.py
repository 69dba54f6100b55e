# SPDX-License-Identifier: Apache-2.0
"""A small mixture-of-experts decoder that generates text on attention and expert ranks through m2n."""
