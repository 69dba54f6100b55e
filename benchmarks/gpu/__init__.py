# SPDX-License-Identifier: Apache-2.0
"""What needs a GPU: `make gpu` and its parts."""
