// Scores as unsigned integers of the same order. No includes.

constexpr unsigned ALL = 0xffffffffu;  // the lanes of a warp

// A uint32 of the same order as the float; 0 is below every number's key.
__device__ unsigned order_key(float score) {
    int bits = __float_as_int(score);
    return (unsigned)(bits ^ ((bits >> 31) | 0x80000000));
}

// The score of a key, with the same bits.
__device__ float key_score(unsigned key) { return __int_as_float((int)(key >> 31 ? key ^ 0x80000000u : ~key)); }
