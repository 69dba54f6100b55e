# SPDX-License-Identifier: Apache-2.0
"""Errors whose cause is the input: a configuration, a checkpoint, a prompt or an argument."""


class InputError(ValueError):
    """Bad input: the command line prints the text and exits with status 2."""


class ConfigError(InputError):
    """A configuration that this model does not run; names the option."""


class CheckpointError(InputError):
    """Files that do not hold what the configuration promises; names the file and the tensor."""
