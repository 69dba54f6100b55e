# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine alone: latency, the paper's figures, growth, copies, joins."""
