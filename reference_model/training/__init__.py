# SPDX-License-Identifier: Apache-2.0
"""How the checkpoint that ships was made."""
