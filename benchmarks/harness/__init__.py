# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks use: cases, process starts, statistics, tables, hosts and links."""
