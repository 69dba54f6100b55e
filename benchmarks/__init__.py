# SPDX-License-Identifier: Apache-2.0
"""Measurements, each against its limit in the same run."""
