// rms_norm: y = x r weight, with r = 1 / sqrt(mean(x^2) + eps).
//
// x[T, C], weight[C], eps[1] -> y[T, C]. A threadgroup takes whole tokens. Between the two uses of
// x a thread keeps its first HELD accesses in registers; where there is a REST, it reads that again.

const int64_t T = x_shape[0];
const int C = x_shape[1];
threadgroup float shared[2 * MOST_SIMDGROUPS];
//// rms_norm<W, HELD, REST>(x, weight, eps, y, shared, T, C): aligned where vectors<W>(x) &&
// vectors<W>(weight) && vectors<W>(y) ////
const int first = first_channel<W>(here), step = next_channel<W>(here);
const int rest = REST ? first + HELD * step : C;
int turn = 0;  // tokens take turns with the halves of `shared`

for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const auto from = x + token * C;
    const auto to = y + token * C;

    decltype(load_raw_streams<1, W>(from, C, 0)) kept[HELD];
    Floats<1> squares = zeros<1>();
    UNROLL for (int k = 0; k < HELD; k++)
        kept[k] = load_raw_streams<1, W>(from, C, first + k * step);
    UNROLL for (int k = 0; k < HELD; k++) {
        const Floats<W> v = floats(kept[k]).at[0];
        squares.at[0] = add_squares(squares.at[0], v);
    }
    for (int c = rest; c < C; c += step) {
        const Floats<W> again = load<W>(from + c);
        squares.at[0] = add_squares(squares.at[0], again);
    }
    squares = sums_for_all(squares, shared + turn * MOST_SIMDGROUPS, here);
    turn = 1 - turn;
    const float r = inverse_rms(squares.at[0], float(C), float(eps[0]));

    UNROLL for (int k = 0; k < HELD; k++) {
        const int c = first + k * step;
        if (c < C) store(to + c, product(times(r, floats(kept[k]).at[0]), load<W>(weight + c)));
    }
    for (int c = rest; c < C; c += step)
        store(to + c, product(times(r, load<W>(from + c)), load<W>(weight + c)));
}
