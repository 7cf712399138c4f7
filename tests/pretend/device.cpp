// An accelerator that is none: CPU memory under a device type of its own, which refuses what CUDA refuses (tensors of
// two devices in one operation, reading its memory without a copy) and counts what costs time there: operations, each
// one kernel launch or more; copies each way and their bytes; the times the host must wait for a value.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr auto kPretend = c10::DeviceType::PrivateUse1;

struct Counts {
  std::atomic<int64_t> launches{0}, to_device{0}, to_device_bytes{0}, to_host{0}, to_host_bytes{0}, waits{0}, held{0},
      most{0};
  std::mutex guard;
  std::map<std::string, int64_t> by_name;

  void launch(const std::string& name) {
    launches++;
    std::lock_guard<std::mutex> locked(guard);
    by_name[name]++;
  }
  void take(int64_t bytes) {
    int64_t now = held += bytes, before = most;
    while (now > before && !most.compare_exchange_weak(before, now)) {
    }
  }
};
Counts counts;
int64_t capacity = 0;  // bytes; 0: no end

// Inside a fallback the CPU does the work, and its copies are none of the device's.
thread_local int working = 0;
struct Working {
  Working() { ++working; }
  ~Working() { --working; }
};

// Each allocation has its size in front of it, so that freeing one can be counted.
constexpr size_t kFront = 64;

void give_back(void* pointer) {
  char* whole = static_cast<char*>(pointer) - kFront;
  counts.held -= *reinterpret_cast<int64_t*>(whole);
  std::free(whole);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK_WITH(OutOfMemoryError, !capacity || counts.held + static_cast<int64_t>(bytes) <= capacity,
                     "pretend out of memory. Tried to allocate ", bytes, " bytes");
    void* whole = nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&whole, 64, bytes + kFront) == 0, "pretend out of memory");
    *static_cast<int64_t*>(whole) = static_cast<int64_t>(bytes);
    counts.take(static_cast<int64_t>(bytes));
    void* pointer = static_cast<char*>(whole) + kFront;
    return {pointer, pointer, &give_back, c10::Device(kPretend, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(kPretend, &memory);

c10::Stream only_stream() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(kPretend, 0)); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kPretend; }
  c10::Device exchangeDevice(c10::Device) const override { return {kPretend, 0}; }
  c10::Device getDevice() const override { return {kPretend, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return only_stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only_stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { counts.waits++; }
  void synchronizeEvent(void*) const override { counts.waits++; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>(c10::detail::getNonDeterministicRandom());
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = getNewGenerator(0);
    return generator;
  }
};
Hooks hooks;
const bool hooked = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// The same memory as a CPU tensor.
at::Tensor seen_by_cpu(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  auto seen = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {},
                            at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU));
  if (tensor.is_conj()) seen._set_conj(true);
  if (tensor.is_neg()) seen._set_neg(true);
  return seen;
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (!working && from.numel()) {
    const auto bytes = static_cast<int64_t>(from.nbytes());
    if (from.is_cpu()) {
      counts.to_device++, counts.to_device_bytes += bytes;
    } else if (to.is_cpu()) {
      counts.to_host++, counts.to_host_bytes += bytes, counts.waits++;
    } else {
      counts.launch("aten::copy_");
    }
  }
  if (to.numel()) {
    Working now;
    seen_by_cpu(to).copy_(seen_by_cpu(from));
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar one_value(const at::Tensor& tensor) {
  if (!working) counts.waits++;
  return seen_by_cpu(tensor).item();
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  int64_t values = 1;
  for (auto n : sizes) values *= n;
  auto storage = self.storage();
  const auto needed = static_cast<size_t>(values + self.storage_offset()) * self.element_size();
  if (storage.nbytes() < needed) {
    auto larger = memory.allocate(needed);
    std::copy_n(static_cast<const char*>(storage.data()), storage.nbytes(), static_cast<char*>(larger.get()));
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// A CPU tensor's values in the device's memory, laid out alike.
at::Tensor moved(const at::Tensor& made) {
  if (!made.defined() || !made.is_cpu()) return made;
  at::Tensor here = at::detail::empty_strided_generic(
      made.sizes(), made.is_non_overlapping_and_dense() ? made.strides() : at::empty_like(made).strides(), &memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), made.scalar_type());
  if (made.numel()) seen_by_cpu(here).copy_(made);
  return here;
}

// The CPU works on the device's own memory: the same strides and alignment, so the same bits as of a CPU tensor.
void by_cpu(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto begin = stack->size() - count;
  const std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  std::vector<std::pair<at::Tensor, at::Tensor>> grown;  // written to and empty: may be resized
  const auto written = [&](size_t i) {
    const auto* alias = schema.arguments()[i].alias_info();
    return alias != nullptr && alias->isWrite();
  };
  const auto seen = [&](const at::Tensor& tensor, bool write) {
    if (!tensor.defined() || tensor.is_cpu()) return tensor;
    if (tensor.numel()) return seen_by_cpu(tensor);
    auto other = at::empty(tensor.sizes(), at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU));
    if (write) grown.emplace_back(tensor, other);
    return other;
  };
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      value = seen(value.toTensor(), written(i));
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> all;
      for (const at::Tensor& one : value.toTensorVector()) all.push_back(seen(one, written(i)));
      value = c10::List<at::Tensor>(all);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> all;
      for (const auto& one : value.toListRef())
        all.push_back(one.isNone() ? std::optional<at::Tensor>() : std::optional<at::Tensor>(seen(one.toTensor(), false)));
      value = all;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& [tensor, other] : grown)
    if (other.numel()) copy_from_and_resize(other, tensor);
  const auto made = schema.returns().size();
  for (size_t i = 0; i < made; ++i) {
    auto& value = (*stack)[stack->size() - made + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias != nullptr) {
      TORCH_CHECK_NOT_IMPLEMENTED(alias->isWrite(), "pretend has no view ", schema.operator_name());
      for (size_t j = 0; j < count; ++j)
        if (written(j) && *schema.arguments()[j].alias_info() == *alias) value = given[j];
    } else if (value.isTensor()) {
      value = moved(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> all;
      for (const at::Tensor& one : value.toTensorVector()) all.push_back(moved(one));
      value = c10::List<at::Tensor>(all);
    }
  }
}

bool indexes(const std::string& name) {
  return name.rfind("aten::index.", 0) == 0 || name.rfind("aten::index_put", 0) == 0 ||
         name.rfind("aten::_index_put", 0) == 0 || name.rfind("aten::_unsafe_index", 0) == 0;
}

void fallback(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto name = c10::toString(op.schema().operator_name());
  if (!working) counts.launch(name);
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(stack, arguments.size());
  bool here = false, first_is_here = false, seen = false;
  std::string elsewhere;
  const auto look = [&](const at::Tensor& tensor, size_t i) {
    if (!tensor.defined()) return;
    const bool on_device = tensor.device().type() == kPretend;
    if (!seen) first_is_here = on_device;
    seen = true;
    here |= on_device;
    if (tensor.is_cpu() && tensor.dim() > 0) elsewhere = arguments[i].name();
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = values[i];
    if (value.isTensor()) {
      look(value.toTensor(), i);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) look(tensor, i);
    } else if (value.isOptionalTensorList()) {
      for (const auto& one : value.toListRef())
        if (one.isTensor()) look(one.toTensor(), i);
    }
  }
  // CUDA takes indices from the CPU too (a copy, which is counted), but indexes no CPU tensor by its own.
  const bool index_from_cpu = indexes(name) && first_is_here;
  TORCH_CHECK(!here || elsewhere.empty() || index_from_cpu,
              "Expected all tensors to be on the same device, but found at least two devices, pretend:0 and cpu! (", name,
              ", argument ", elsewhere, ")");
  if (index_from_cpu && !elsewhere.empty() && !working) counts.to_device++;
  // Their results' sizes depend on values, so the host waits for them.
  if (!working && (name == "aten::nonzero" || name.rfind("aten::masked_select", 0) == 0 ||
                   name.rfind("aten::_unique", 0) == 0 || name == "aten::equal" || name.rfind("aten::unique", 0) == 0))
    counts.waits++;
  Working now;
  by_cpu(op, stack);
}

c10::Dict<std::string, int64_t> counted() {
  c10::Dict<std::string, int64_t> all;
  all.insert("launches", counts.launches);
  all.insert("to_device", counts.to_device);
  all.insert("to_device_bytes", counts.to_device_bytes);
  all.insert("to_host", counts.to_host);
  all.insert("to_host_bytes", counts.to_host_bytes);
  all.insert("waits", counts.waits);
  all.insert("most_bytes", counts.most);
  all.insert("held_bytes", counts.held);
  return all;
}

c10::Dict<std::string, int64_t> launches() {
  c10::Dict<std::string, int64_t> all;
  std::lock_guard<std::mutex> locked(counts.guard);
  for (const auto& [name, count] : counts.by_name) all.insert(name, count);
  return all;
}

void reset() {
  counts.launches = counts.to_device = counts.to_device_bytes = counts.to_host = counts.to_host_bytes = counts.waits = 0;
  counts.most = static_cast<int64_t>(counts.held);
  std::lock_guard<std::mutex> locked(counts.guard);
  counts.by_name.clear();
}

void hold_at_most(int64_t bytes) { capacity = bytes; }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &one_value);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", TORCH_FN(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  // Composite for devices of one's own; a kernel on the CPU and on CUDA.
  for (const char* name : {"silu_backward", "mish_backward", "native_layer_norm", "native_layer_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// Autocast shortens the products that it shortens on CUDA.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define PRETEND_SHORT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(PRETEND_SHORT)
#define PRETEND_SINGLE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(PRETEND_SINGLE)
}

TORCH_LIBRARY(pretend, m) {
  m.def("counted() -> Dict(str, int)", &counted);
  m.def("launches() -> Dict(str, int)", &launches);
  m.def("reset() -> ()", &reset);
  m.def("hold_at_most(int bytes) -> ()", &hold_at_most);
}
