// Sixteen vectors of one head into their frame and out of it, one vector to a lane: x[i] holds channel i of each.
#pragma once

#include "coding.h"
#include "vec.h"

namespace kvist {

using Lanes = float[kLanes];

// The Hadamard matrix of each block, which is its own inverse, in the order of operations of coding.py.
void hadamard(Lanes* x, const std::vector<int64_t>& blocks);

// Channels that stand in the frame's order: signs and rotation, there and back.
void rotate(Lanes* x, const Coding& coding, const Frame& frame);
void rotate_back(Lanes* x, const Coding& coding, const Frame& frame);

}  // namespace kvist
