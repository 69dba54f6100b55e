# SPDX-License-Identifier: Apache-2.0
"""Starting ranks, what one rank runs, and what a run gives."""
