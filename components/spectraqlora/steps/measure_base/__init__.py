"""The measure-base step."""
