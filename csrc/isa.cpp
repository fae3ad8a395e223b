// Selects the best instruction set that the CPU and the operating system support.
#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "layout.h"
#include "isa.h"

namespace halfbyte {
namespace {

struct Choice {
  const Isa* isa;
  bool usable;
};

#if defined(__x86_64__)
// Linux grants tile registers to a process on request.
bool allow_tiles() {
#if defined(__linux__)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// Compiled without any of the instructions that it tests for.
const Choice* choices(int* count) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool amx = avx512 && __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("avx512vnni") &&
                          __builtin_cpu_supports("amx-bf16") &&
                          __builtin_cpu_supports("amx-int8") && allow_tiles();
  static const Choice all[] = {{&SERIAL, true}, {&AVX2, avx2}, {&AVX512, avx512}, {&AMX, amx}};
#elif defined(__aarch64__)
  static const Choice all[] = {{&SERIAL, true}, {&NEON, true}};
#else
  static const Choice all[] = {{&SERIAL, true}};
#endif
  *count = int(sizeof(all) / sizeof(all[0]));
  return all;
}

const Isa* selected = nullptr;

const Isa* best() {
  int count;
  const Choice* all = choices(&count);
  while (!all[count - 1].usable) count--;
  return all[count - 1].isa;
}

}  // namespace

const Isa& current_isa() {
  if (!selected) selected = best();
  return *selected;
}

}  // namespace halfbyte

using namespace halfbyte;

extern "C" const char* hb_isa(void) { return current_isa().name; }

extern "C" const char* hb_isas(void) {
  static char names[64];
  int count;
  const Choice* all = choices(&count);
  char* end = names;
  for (int i = 0; i < count; i++) {
    if (!all[i].usable) continue;
    if (end > names) *end++ = ',';
    const size_t length = strlen(all[i].isa->name);
    memcpy(end, all[i].isa->name, length);
    end += length;
  }
  *end = 0;
  return names;
}

extern "C" int hb_select_isa(const char* name) {
  int count;
  const Choice* all = choices(&count);
  if (!name) {
    selected = best();
    return HB_OK;
  }
  for (int i = 0; i < count; i++) {
    if (strcmp(all[i].isa->name, name) != 0) continue;
    if (!all[i].usable) return HB_ABSENT_ISA;
    selected = all[i].isa;
    return HB_OK;
  }
  return HB_UNKNOWN_ISA;
}
