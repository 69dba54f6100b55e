# SPDX-License-Identifier: Apache-2.0
"""What traces say: who waited, for how long, and what a simulated clock makes of the same schedule."""
