"""Test sets for zero-shot classification: photos of one class each, and names of the classes."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

# The templates of a language without its own: the name alone.
NAME_ALONE = ("{}",)


@dataclasses.dataclass(frozen=True)
class ClassificationSet:
    """Photos of one class each, and the names of classes in one or more languages.

    Attributes:
      name: name of the results.
      images: the photos, each as encoded bytes or as a path.
      class_of: the class of each photo.
      classes: language -> the classes that have a name in it.
      names: language -> the name of each of these classes.
      templates: language -> its prompts, in which {} stands for a name; a language that is not
        here has `NAME_ALONE`.
      fingerprint: identifies the photos' content, for the feature cache.
    """

    name: str
    images: Sequence
    class_of: Int[np.ndarray, " photos"]
    classes: dict[str, Int[np.ndarray, " classes"]]
    names: dict[str, list[str]]
    templates: Mapping[str, Sequence[str]]
    fingerprint: str

    def prompts(self, language: str) -> list[list[str]]:
        """The prompts of each class that has a name in a language."""
        templates = self.templates.get(language, NAME_ALONE)
        return [
            [template.replace("{}", name) for template in templates]
            for name in self.names[language]
        ]

    def only(self, languages: Sequence[str]) -> "ClassificationSet":
        """The same set in some of its languages.

        Raises:
          ValueError: a language has no names.
        """
        if lacking := [language for language in languages if language not in self.names]:
            raise ValueError(
                f"{self.name} has no class names in {', '.join(lacking)}; it has names in "
                f"{' '.join(self.names)}"
            )
        classes, names = (
            {language: of_each[language] for language in languages}
            for of_each in (self.classes, self.names)
        )
        return dataclasses.replace(self, classes=classes, names=names)
