// In the place of label_mma.cuh, whose tensor core instructions a CPU has not: the same scores, token by token.

constexpr int ROW_BYTES = CHANNELS * BITS / 8;
constexpr float LOG2E = 1.4426950408889634f;

static float from_half(unsigned bits) {
    unsigned sign = bits & 0x8000, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    float value = exponent == 31 ? NAN : ldexpf(exponent ? 1024 + fraction : fraction, (exponent ? exponent : 1) - 25);
    return sign ? -value : value;
}

struct Batch {
    const unsigned char* words[STEPS];  // the codes of this lane's token of each step
    unsigned pair[STEPS];
};

struct Query {
    const float *labels, *offsets;
};

struct Source {
    const unsigned char* codes;
    const unsigned* scales;
};

static int token_of(int lane) { return 8 * (lane & 3) + (lane >> 2); }

static Source source_at(const unsigned char* codes, const unsigned* scales, int token, int lane) {
    return {codes + (long long)(token + token_of(lane)) * ROW_BYTES, scales + token + token_of(lane)};
}

static void load_last_batch(Source source, int left, int lane, Batch& batch) {
    for (int step = 0; step < STEPS; ++step) {
        int token = min(32 * step + token_of(lane), left - 1) - token_of(lane);
        batch.words[step] = source.codes + (long long)token * ROW_BYTES, batch.pair[step] = source.scales[token];
    }
}

static void load_batch(Source source, Batch& batch) {
    for (int step = 0; step < STEPS; ++step)
        batch.words[step] = source.codes + 32 * step * ROW_BYTES, batch.pair[step] = source.scales[32 * step];
}

static void load_query(const float* labels, const float* offsets, int, Query& query) { query = {labels, offsets}; }

struct Dots {
    const unsigned char* codes;
    unsigned pair;
};

static Dots multiply_step(const Batch& batch, int step, const Query&) { return {batch.words[step], batch.pair[step]}; }

static float score_step(Dots dots, const Query& query, int) {
    static_assert(BITS == 4, "of the label formats this one is here");
    float scale = from_half(dots.pair & 0xffff), offset = from_half(dots.pair >> 16), most = -INFINITY, x[GROUP], sum = 0;
    for (int head = 0; head < GROUP; ++head) {
        double dot = 0;
        for (int r = 0; r < CHANNELS; ++r) {
            int byte = dots.codes[r % (CHANNELS / 2)], code = r < CHANNELS / 2 ? byte & 15 : byte >> 4;
            dot += query.labels[head * CHANNELS + r] * (code * scale + offset);
        }
        x[head] = (float)(dot - query.offsets[head]) * LOG2E;
        most = fmaxf(most, x[head]);
    }
    for (float value : x) sum += exp2f(value - most);
    return most + log2f(sum);
}
