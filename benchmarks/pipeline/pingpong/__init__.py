# SPDX-License-Identifier: Apache-2.0
"""What m microbatches gain, measured and simulated."""
