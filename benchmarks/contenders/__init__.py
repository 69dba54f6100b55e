# SPDX-License-Identifier: Apache-2.0
"""Those who do the same job beside m2n."""
