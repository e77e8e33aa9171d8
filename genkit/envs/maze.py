"""An expert for PointMaze (gymnasium-robotics): the shortest way through the maze, from cell to cell."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from genkit.envs.gym import create

SIDES = ((0, 1), (1, 0), (0, -1), (-1, 0))


class Expert:
    """Pushes N balls along the shortest way, each to the middle of the next cell, and at last to the goal.

    What it does depends on what it sees alone: it draws nothing, and may be put anywhere.
    """

    PULL, BRAKE = 10.0, 2.0  # of the push, for each unit of way and of speed

    def __init__(self, num: int, env: str):
        maze = create(env).unwrapped.maze
        self.centre = np.array([maze.x_map_center, maze.y_map_center])
        self.scale = float(maze.maze_size_scaling)
        # 1 is a wall; other cells may be named after what is put there
        self.next = next_cells(np.array([[cell == 1 for cell in row] for row in maze.maze_map]))

    def reset(self, seeds: Sequence[int]) -> None: ...

    def cells(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of places ``[N, 2]``: rows count down, from above."""
        x, y = places.T
        row = np.floor((self.centre[1] - y) / self.scale).astype(int)
        column = np.floor((self.centre[0] + x) / self.scale).astype(int)
        return row.clip(0, self.next.shape[0] - 1), column.clip(0, self.next.shape[1] - 1)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The push ``[N, 2]`` for observations ``[N, 8]``: the place, the goal, the place again, the speed."""
        place, goal, speed = obs[:, :2], obs[:, 2:4], obs[:, 6:8]
        row, column = np.moveaxis(self.next[(*self.cells(place), *self.cells(goal))], -1, 0)
        middle = np.stack([column + 0.5, -(row + 0.5)], 1) * self.scale + self.centre * [-1, 1]
        there = (np.stack([row, column]) == np.stack(self.cells(goal))).all(0)
        aim = np.where(there[:, None], goal, middle)
        return (self.PULL * (aim - place) - self.BRAKE * speed).clip(-1, 1)


def next_cells(wall: np.ndarray) -> np.ndarray:
    """Of walls ``[R, C]`` the cell that comes next on the shortest way, ``[R, C, R, C, 2]``, from a cell to another.

    By breadth first (Moore 1959). Where no way leads, and in the cell itself, it is the cell itself.
    """
    here = np.stack(np.meshgrid(*map(np.arange, wall.shape), indexing="ij"), -1)
    found = np.broadcast_to(here[:, :, None, None], (*wall.shape, *wall.shape, 2)).copy()
    for goal in map(tuple, np.argwhere(~wall).tolist()):
        known, waiting = {goal}, deque([goal])
        while waiting:
            row, column = at = waiting.popleft()
            for down, right in SIDES:
                cell = (row + down, column + right)
                inside = 0 <= cell[0] < wall.shape[0] and 0 <= cell[1] < wall.shape[1]
                if inside and not wall[cell] and cell not in known:
                    known.add(cell)
                    waiting.append(cell)
                    found[(*cell, *goal)] = at
    return found
