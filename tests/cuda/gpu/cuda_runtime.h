// CUDA as the kernels see it.
#pragma once
#include "emulated.h"
