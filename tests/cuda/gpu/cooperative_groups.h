// In emulated.h.
#pragma once
#include "emulated.h"
