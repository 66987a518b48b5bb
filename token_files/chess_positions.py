"""Final positions of many chess games at once: every board takes its n-th half-move in one NumPy step. Moves to FEN, no files.

python-chess replays some 600 games a second, which for the tens of millions of a Lichess month makes a day of computing; in
step it is ten times as many. The rules are written out once, below, and tested against python-chess game by game.

A board is 64 bytes, a1 = 0, b1 = 1, … h8 = 63, and a 65th that stands for every square off the board. Pieces are 1 … 6 for
PNBRQK, and 8 more for black; 0 is empty, 7 is off the board.
"""

import re

import numpy as np

EMPTY, P, N, B, R, Q, K, OFF = range(8)
NONE = 64  # no such square
SAN = re.compile(rb'(?:(O-O(?:-O)?)|([KQRBN])([a-h])?([1-8])?x?([a-h][1-8])'
                 rb'|(?:([a-h])x)?([a-h][1-8])(?:=([QRBN]))?)[+#]?[!?]{0,2}')  # fmt: skip
DIRECTIONS = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]  # (rank, file); straight, then diagonal
JUMPS = [(1, 2), (2, 1), (-1, 2), (-2, 1), (1, -2), (2, -1), (-1, -2), (-2, -1)]


def square(rank, file):
    return 8 * rank + file if 0 <= rank < 8 and 0 <= file < 8 else NONE


# RAY[s, d, n]: the square n + 1 steps from s in direction d; eight steps always lead off the board. JUMP[s, j]: a knight's squares.
RAY = np.array([[[square(s // 8 + i * r, s % 8 + i * f) for i in range(1, 9)] for r, f in DIRECTIONS] for s in range(65)])
JUMP = np.array([[square(s // 8 + r, s % 8 + f) for r, f in JUMPS] for s in range(65)])
RAY[NONE], JUMP[NONE] = NONE, NONE

# MOVES[piece, d, far]: can it go along direction d, one step (far 0) or more (far 1)?
MOVES = np.zeros((8, 8, 2), bool)
MOVES[R, :4] = MOVES[B, 4:] = MOVES[Q] = MOVES[K, :, 0] = True
# HITS[d, far, piece]: does that piece, first met in direction d from a square, attack the square? Pawns do by colour.
HITS = np.zeros((8, 2, 16), bool)
HITS[:, :, B:OFF] = HITS[:, :, 8 + B : 8 + OFF] = MOVES[B:OFF].transpose(1, 2, 0)
HITS[6:, 0, P] = HITS[4:6, 0, 8 + P] = True  # a white pawn below, a black one above

# castling rights are bits K 1, Q 2, k 4, q 8; a move from or to a square keeps these
KEEP = np.full(65, 15, np.uint8)
KEEP[[4, 7, 0, 60, 63, 56]] = [12, 14, 13, 3, 11, 7]


def parse_san(move: bytes) -> int:
    """A move's piece, destination, given file and rank (8: none) and promotion in one integer; -1 for what is no move.

    Bits 0-2 piece (0 for castling, whose destination is the file of the king), 3-8 square, 9-12 file, 13-16 rank, 17-19 promotion.
    """
    if not (m := SAN.fullmatch(move)):
        return -1
    castle, piece, file, rank, to, pawn_file, pawn_to, promotion = m.groups()
    if castle:
        return (6 if len(castle) == 3 else 2) << 3 | 8 << 9 | 8 << 13
    to, file = to or pawn_to, file or pawn_file
    kind = b'PNBRQK'.index(piece or b'P') + 1
    target = square(to[1] - ord('1'), to[0] - ord('a'))
    return (kind | target << 3 | (file[0] - ord('a') if file else 8) << 9 | (rank[0] - ord('1') if rank else 8) << 13
            | (b'PNBRQK'.index(promotion) + 1 if promotion else 0) << 17)  # fmt: skip


class Codes(dict):
    """parse_san remembered: codes[move]. A month of games has some ten thousand different moves."""

    def __missing__(self, move):
        code = parse_san(move)
        if len(self) < 1 << 17:  # hostile text must not fill the memory
            self[move] = code
        return code


def first_met(board, squares):
    """What is met first, looking from `squares` [G] in eight directions: its squares, its pieces, is it beyond one step? [G, 8]"""
    offset = 65 * np.arange(len(board))[:, None]  # board.take with flat indices takes half the time of board[rows, squares]
    step = board.take(RAY[squares] + offset[:, :, None]).astype(bool).argmax(2)
    met = RAY[squares[:, None], np.arange(8), step]
    return met, board.take(met + offset), (step > 0).view(np.uint8)


def attacked(board, squares, by):
    """Is the square of each board attacked by colour `by` (0 white, 8 black)? [G] bool"""
    _, pieces, far = first_met(board, squares)
    pieces = np.where(pieces & 8 == by, pieces, EMPTY)
    jumpers = board[np.arange(len(board))[:, None], JUMP[squares]]
    return HITS[np.arange(8), far, pieces].any(1) | (jumpers == N + by).any(1)


def origins(board, king, kind, to, file, rank, own):
    """Where the piece comes from that each move names, NONE if no piece or more than one can legally make it. [G]"""
    met, pieces, far = first_met(board, to)
    can = MOVES[kind[:, None], np.arange(8), far]
    knight = kind == N
    jumps = JUMP[to[knight]]
    met[knight], pieces[knight], can[knight] = jumps, board[np.flatnonzero(knight)[:, None], jumps], True
    can &= pieces == (kind + own)[:, None]
    can &= (file[:, None] == 8) | (met & 7 == file[:, None])
    can &= (rank[:, None] == 8) | (met >> 3 == rank[:, None])
    several = np.flatnonzero(can.sum(1) > 1)
    for d in range(8) if len(several) else ():  # of several pieces only one may be free to move: the others are pinned
        i = several[can[several, d]]
        trial, rows = board[i], np.arange(len(i))
        trial[rows, to[i]], trial[rows, met[i, d]] = trial[rows, met[i, d]], EMPTY
        can[i, d] = ~attacked(trial, king[i], 8 - own)
    return np.where(can.sum(1) == 1, met[np.arange(len(met)), can.argmax(1)], NONE)


def replay(games: list[list[int]]) -> list[bytes | None]:
    """FEN of the position after each game's moves (codes of parse_san) from the usual start; None if a move is illegal.

    As python-chess writes it: the en-passant square only where such a capture is legal. Every game has at least one move.
    """
    count = np.array([len(game) for game in games])
    order = np.argsort(-count, kind='stable')  # longest first, so that the games still going on are the first n
    codes = np.concatenate([games[i] for i in order])
    first = np.cumsum(count[order]) - count[order]
    board = np.tile(np.array([*[R, N, B, Q, K, B, N, R], *[P] * 8, *[EMPTY] * 32, *[8 + P] * 8,
                              *[8 + x for x in (R, N, B, Q, K, B, N, R)], OFF], np.uint8), (len(games), 1))  # fmt: skip
    kings = np.tile([[4], [60]], len(games))
    rights, ep = np.full(len(games), 15, np.uint8), np.full(len(games), NONE)
    clock, legal = np.zeros(len(games), int), np.ones(len(games), bool)
    active = np.searchsorted(-count[order], -np.arange(1, count.max() + 1), side='right')
    for ply, n in enumerate(active):
        step(board[:n], kings[:, :n], rights[:n], ep[:n], clock[:n], legal[:n], codes[first[:n] + ply],
             8 * (ply % 2))
    fens = write_fens(board, kings, rights, ep, clock, count[order])
    out = [None] * len(games)
    for column, i in enumerate(order):
        out[i] = fens[column] if legal[column] else None
    return out


def step(board, kings, rights, ep, clock, legal, codes, own):
    """One half-move of every game, in place. After an illegal move a board holds nonsense and `legal` stays False."""
    rows = np.arange(len(board))
    kind, to, file, rank, promotion = codes & 7, codes >> 3 & 63, codes >> 9 & 15, codes >> 13 & 15, codes >> 17 & 7
    king = kings[own >> 3]
    home, up, last = 7 * own, 8 - 2 * own, 7 - 7 * (own >> 3)  # first square of the back rank; a step forward; rank to promote on
    legal &= codes >= 0

    castles = np.flatnonzero(kind == 0)
    to[castles] = home + to[castles] & 63
    origin = np.full(len(board), NONE)
    for i, wing in ((castles[to[castles] & 7 == 6], 1), (castles[to[castles] & 7 != 6], 2)):
        between = [5, 6] if wing == 1 else [3, 2, 1]
        free = (rights[i] & wing << (own >> 2) != 0) & (board[i[:, None], home + np.array(between)] == EMPTY).all(1)
        for s in (4, between[0]):  # not out of check, nor through it; into it is asked of every move below
            free &= ~attacked(board[i], np.full(len(i), home + s), 8 - own)
        legal[i] &= free
        origin[i] = home + 4

    pieces = np.flatnonzero(kind >= N)
    origin[pieces] = origins(board[pieces], king[pieces], kind[pieces], to[pieces], file[pieces], rank[pieces], own)

    pawns = np.flatnonzero(kind == P)
    target, start = to[pawns], to[pawns] - up
    takes = file[pawns] < 8
    behind = np.where((start >= 0) & (start < 64), start, NONE)
    double = ~takes & (board[pawns, behind] == EMPTY) & (target >> 3 == (3 if own == 0 else 4))
    start = np.where(double, behind - up, behind)
    start = np.where(takes, np.where(abs((target & 7) - file[pawns]) == 1, (behind & 56) + file[pawns], NONE), start)
    start = np.where((behind == NONE) | (board[pawns, start] != P + own), NONE, start)
    origin[pawns] = start
    passing = pawns[takes & (target == ep[pawns]) & (start != NONE)]
    full = board[pawns, target] != EMPTY
    full[np.isin(pawns, passing, assume_unique=True)] = True
    legal[pawns] &= (takes == full) & ((promotion[pawns] > 0) == (target >> 3 == last))
    board[passing, to[passing] - up] = EMPTY

    taken = board[rows, to]
    legal &= (origin != NONE) & ((taken == EMPTY) | (taken & 8 != own))
    moved = board[rows, origin]
    board[rows, origin] = EMPTY
    board[rows, to] = np.where(promotion > 0, promotion + own, moved)
    for i, rook, beside in ((castles[to[castles] & 7 == 6], 7, 5), (castles[to[castles] & 7 != 6], 0, 3)):
        board[i, home + rook], board[i, home + beside] = EMPTY, R + own
    king[:] = np.where(moved == K + own, to, king)
    rights &= KEEP[origin] & KEEP[to]
    clock += 1
    clock[(kind == P) | (taken != EMPTY)] = 0
    ep[:] = NONE
    ep[pawns[double]] = to[pawns[double]] - up
    legal &= ~attacked(board, king, 8 - own)


CHARACTERS = np.frombuffer(b'1PNBRQK?1pnbrqk?', np.uint8)
RIGHTS = [''.join(c for bit, c in enumerate('KQkq') if r >> bit & 1).encode() or b'-' for r in range(16)]
NAMES = [b'%c%d' % (ord('a') + s % 8, s // 8 + 1) for s in range(64)] + [b'-']


def write_fens(board, kings, rights, ep, clock, count):
    """FEN lines of the boards after `count` [G] half-moves each."""
    ep = np.where(can_pass(board, kings, ep, 8 * (count % 2)), ep, NONE)
    ranks = np.full((len(board), 8, 9), ord('/'), np.uint8)
    ranks[:, :, :8] = CHARACTERS[board[:, :64].reshape(-1, 8, 8)[:, ::-1]]
    text, fens = ranks.reshape(-1, 72)[:, :71].tobytes(), []
    for i in range(len(board)):
        places = text[71 * i : 71 * i + 71]
        for run in range(8, 1, -1):
            places = places.replace(b'1' * run, b'%d' % run)
        fens.append(b'%s %s %s %s %d %d' % (places, b'wb'[count[i] % 2 :][:1], RIGHTS[rights[i]], NAMES[ep[i]], clock[i],
                                            count[i] // 2 + 1))
    return fens


def can_pass(board, kings, ep, own):
    """Can the side to move, `own` [G], legally take en passant on `ep` [G]? [G] bool"""
    found = np.zeros(len(board), bool)
    for colour in (0, 8):
        i = np.flatnonzero((ep != NONE) & (own == colour))
        up, rows = 8 - 2 * colour, np.arange(len(i))
        for side in (-1, 1):
            start = ep[i] - up + side
            beside = abs((start & 7) - (ep[i] & 7)) == 1
            trial = board[i]
            found_here = beside & (trial[rows, start] == P + colour)
            trial[rows, start], trial[rows, ep[i]], trial[rows, ep[i] - up] = EMPTY, P + colour, EMPTY
            found[i] |= found_here & ~attacked(trial, kings[colour >> 3, i], 8 - colour)
    return found
