"""Numbers that tools may be given on the command line."""
import argparse


def positive(text: str) -> int:
    """Parse a whole number above 0.

    Args:
        text (str): What was typed.

    Returns:
        int: The number.

    Raises:
        ArgumentTypeError: If it is something else.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"expected a whole number above 0, got '{text}'")
    return int(text)


def seed_number(text: str) -> int:
    """Parse a seed that numpy takes.

    Args:
        text (str): What was typed.

    Returns:
        int: The seed.

    Raises:
        ArgumentTypeError: If it is something else.
    """
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to {2**32 - 1}, got '{text}'")
    return int(text)
