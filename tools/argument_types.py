"""Numbers that tools may be given on the command line, as argparse's types."""
import argparse


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    return _whole_number(text, range(1, 2**63), 'above 0')


def seed_number(text: str) -> int:
    """Parse a seed that numpy takes."""
    return _whole_number(text, range(2**32), f'from 0 to {2**32 - 1}')


def _whole_number(text: str, allowed: range, words: str) -> int:
    if not text.isdecimal() or int(text) not in allowed:
        raise argparse.ArgumentTypeError(
            f"expected a whole number {words}, got '{text}'")
    return int(text)
