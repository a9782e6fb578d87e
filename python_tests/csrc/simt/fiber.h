// A stack of its own for each thread of a block. On x86-64 a switch saves the six registers that a call
// keeps, ten times faster than swapcontext, which asks the system for the signal mask each time.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStack = 256 << 10;

inline void* new_stack() {
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack != MAP_FAILED) return stack;
  std::fprintf(stderr, "simt: no memory for a fiber's stack\n");
  std::abort();
}

#if defined(__x86_64__)

extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

class Context {
 public:
  // The next switch to this context calls `entry`, which never returns.
  void start(void (*entry)()) {
    if (!stack_) stack_ = new_stack();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack_, kStack);
    bottom_ = stack_;
    size_ = kStack;
    fake_ = nullptr;
#endif
    auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_) + kStack);
    *--top =
        0;  // where a caller's address would be: the stack is aligned as if `entry` were called
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    pointer_ = top;
  }

  void resume_from(Context& other) {
#if defined(__SANITIZE_ADDRESS__)
    left() = &other;
    __sanitizer_start_switch_fiber(&other.fake_, bottom_, size_);
#endif
    simt_switch(&other.pointer_, pointer_);
    other.entered();
  }

  // What runs on this stack first after a switch to it.
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &left()->bottom_, &left()->size_);
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static Context*& left() {
    static Context* context = nullptr;
    return context;
  }
  void* fake_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
  void* stack_ = nullptr;
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void start(void (*entry)()) {
    if (!stack_) stack_ = new_stack();
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void resume_from(Context& other) { swapcontext(&other.context_, &context_); }
  void entered() {}

 private:
  void* stack_ = nullptr;
  ucontext_t context_;
};

#endif

}  // namespace simt
