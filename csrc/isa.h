#pragma once
#include "layout.h"

namespace halfbyte {

const Isa& current_isa();

}  // namespace halfbyte
