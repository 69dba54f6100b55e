# SPDX-License-Identifier: Apache-2.0
"""What any command owes its user, model or benchmark: lines, tables, files, children. It knows no model."""
