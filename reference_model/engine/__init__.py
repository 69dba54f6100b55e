# SPDX-License-Identifier: Apache-2.0
"""What a rank does and when: schedules, batches, the loop over layers, the monolithic run beside them."""
