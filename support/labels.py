"""Labels of a data set as the numbers that a model knows its classes by, however they are spelled."""

from collections.abc import Mapping

from datasets import ClassLabel


def numbers_by_spelling(class_names: Mapping[str, int], kind: object) -> dict[str, int]:
    """The model's number for every `spelling` of a label, given its numbers by their names.

    `kind` is the type of the labels. Named ones may stand in another order than the model's. Raises
    `ValueError` when some of their names are the model's and some are not, and when a number could be
    the name of one class and the place of another.
    """
    by_name = {spelling(one): number for one, number in class_names.items()}
    by_number = {str(number): number for number in class_names.values()}
    if len(by_name) < len(class_names):  # names that differ in capitals only
        by_name = dict(class_names)
    if not isinstance(kind, ClassLabel):
        if "string" in getattr(kind, "dtype", ""):
            return by_number | by_name
        both = [one for one in by_number if by_name.get(one, by_number[one]) != by_number[one]]
        if both:
            raise ValueError(
                "has numbers for labels, and the model calls its classes by other numbers: a label "
                f"{both[0]} could be a name or a place. Write the labels as text, which are names, or the "
                "model's id2label in words."
            )
        return by_number
    found = [by_name.get(spelling(one)) for one in kind.names]
    if None not in found:
        return {str(number): one for number, one in enumerate(found)}
    if any(one is not None for one in found):
        raise ValueError(
            f"calls its classes {', '.join(kind.names)}, the model {', '.join(class_names)}: some are the "
            "same and some are not, so their numbers can't be trusted. Use the model's names."
        )
    return by_number


def spelling(label: object) -> str:
    """One for labels that say the same: 1, 1.0, True and "1"; "Positive" and "positive"."""
    if isinstance(label, bool | float) and float(label).is_integer():
        label = int(label)
    return str(label).strip().casefold()
