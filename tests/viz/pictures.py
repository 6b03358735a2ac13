"""What tests of pictures share."""

import matplotlib.image


def nothing_is_cut(path):
    """Whether the outermost pixels are white: a label that ran over the edge would show."""
    pixels = matplotlib.image.imread(path)[..., :3]
    edges = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
    return all((edge == 1).all() for edge in edges) and (pixels < 0.9).any()


def titles(figure):
    return [axes.get_title() for axes in figure.axes]
