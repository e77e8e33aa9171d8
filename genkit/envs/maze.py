"""A scripted expert for PointMaze (gymnasium-robotics): the shortest path through the maze, from cell to cell."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from genkit.envs.gym import create

NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0))


class MazeExpert:
    """Pushes N balls along the shortest path, each to the centre of the next cell and finally to its goal.

    Its actions are a function of the observation only: it draws nothing and has no memory.
    """

    GAIN, DAMPING = 10.0, 2.0  # push for each unit of distance and of velocity

    def __init__(self, num: int, env: str):
        maze = create(env).unwrapped.maze
        self.centre = np.array([maze.x_map_center, maze.y_map_center])
        self.scale = float(maze.maze_size_scaling)
        # 1 is a wall; other cells may be named after what is placed there
        self.next = next_cells(np.array([[cell == 1 for cell in row] for row in maze.maze_map]))

    def reset(self, seeds: Sequence[int]) -> None: ...

    def cells(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of positions ``[N, 2]``; rows are counted downwards."""
        x, y = positions.T
        row = np.floor((self.centre[1] - y) / self.scale).astype(int)
        column = np.floor((self.centre[0] + x) / self.scale).astype(int)
        return row.clip(0, self.next.shape[0] - 1), column.clip(0, self.next.shape[1] - 1)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The push ``[N, 2]`` for observations ``[N, 8]``: position, goal, position again, velocity."""
        position, goal, velocity = obs[:, :2], obs[:, 2:4], obs[:, 6:8]
        row, column = np.moveaxis(self.next[(*self.cells(position), *self.cells(goal))], -1, 0)
        middle = np.stack([column + 0.5, -(row + 0.5)], 1) * self.scale + self.centre * [-1, 1]
        in_goal_cell = (np.stack([row, column]) == np.stack(self.cells(goal))).all(0)
        target = np.where(in_goal_cell[:, None], goal, middle)
        return (self.GAIN * (target - position) - self.DAMPING * velocity).clip(-1, 1)


def next_cells(wall: np.ndarray) -> np.ndarray:
    """The next cell on the shortest path from every cell to every other, ``[R, C, R, C, 2]``, of walls ``[R, C]``.

    By breadth-first search (Moore 1959). Without a path, and in the goal itself, it is the cell itself.
    """
    cells = np.stack(np.meshgrid(*map(np.arange, wall.shape), indexing="ij"), -1)
    following = np.broadcast_to(cells[:, :, None, None], (*wall.shape, *wall.shape, 2)).copy()
    for goal in map(tuple, np.argwhere(~wall).tolist()):
        visited, queue = {goal}, deque([goal])
        while queue:
            row, column = current = queue.popleft()
            for down, right in NEIGHBOURS:
                cell = (row + down, column + right)
                inside = 0 <= cell[0] < wall.shape[0] and 0 <= cell[1] < wall.shape[1]
                if inside and not wall[cell] and cell not in visited:
                    visited.add(cell)
                    queue.append(cell)
                    following[(*cell, *goal)] = current
    return following
